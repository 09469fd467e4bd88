-- One JSON line after wrk's own report: exact microseconds and every kind of error.
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '\n@{"requests":%d,"duration_us":%d,"bytes":%d,"p50_us":%d,"p90_us":%d,"p99_us":%d,"max_us":%d,' ..
    '"errors":%d,"statuses":%d}\n',
    summary.requests, summary.duration, summary.bytes,
    latency:percentile(50), latency:percentile(90), latency:percentile(99), latency.max,
    e.connect + e.read + e.write + e.timeout, e.status))
end
