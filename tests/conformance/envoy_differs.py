"""Where Envoy 1.40 does not do what RFC 9113 and RFC 7541 ask: case → what it does instead. We follow the RFC."""

ENVOY_DIFFERS: dict[str, str] = {
    "6.3_priority_on_stream_0": "ignores it",
    "6.8_open_stream_ends_well_after_goaway_twice": "closes the connection, with the request that is open",
    "test_3_4_preface_in_single_bytes": "resets: its codec_type AUTO decides by what the first read brings",
    "4.2_continuation_too_large": "serves the request: SETTINGS_MAX_FRAME_SIZE does not hold for CONTINUATION",
}
