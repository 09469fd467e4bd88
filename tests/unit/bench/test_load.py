"""bench.load: what is read from the report of another program."""

from bench.load import h2load_figures

REPORT = """\
finished in 2.00s, 18019.00 req/s, 1.17MB/s
requests: 36040 total, 36072 started, 36040 done, 36038 succeeded, 2 failed, 1 errored, 0 timeout
status codes: 36038 2xx, 0 3xx, 1 4xx, 0 5xx
traffic: 2.34MB (2450724) total, 1.31MB (1369529) headers (space savings 68.85%), 422.32KB (432456) data
                     min         max         mean         sd        +/- sd
time for request:      250us     11.19ms      1.75ms       890us    82.05%
time for connect:       58us        58us        58us         0us   100.00%
"""


def test_h2load_report_is_read_in_microseconds_and_counts() -> None:
    assert h2load_figures(REPORT) == {
        "req_s": 18019.0,
        "done": 36040.0,
        "failed": 2.0,
        "redirected": 0.0,
        "bytes": 432456.0,
        "max_us": 11190.0,
        "mean_us": 1750.0,
    }


def test_h2load_report_without_a_line_is_none() -> None:
    for line in REPORT.splitlines(keepends=True):
        if not line.startswith((" ", "time for connect")):
            assert h2load_figures(REPORT.replace(line, "")) is None, line
