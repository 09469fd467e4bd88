"""Where Envoy 1.40 does not do what RFC 9113 and RFC 7541 ask: case → what it does instead. We follow the RFC."""

ENVOY_DIFFERS: dict[str, str] = {
    "test_3_4_preface_in_single_bytes": "resets: its codec_type AUTO decides by what the first read brings",
    "4.2_continuation_too_large": "serves the request: SETTINGS_MAX_FRAME_SIZE does not hold for CONTINUATION",
}
