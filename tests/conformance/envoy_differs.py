"""Where Envoy 1.40 does not do what RFC 9113 and RFC 7541 ask: case → what it does instead. We follow the RFC."""

_WHITE_SPACE = [
    f"8.2.1_{field}_{what}"
    for field in ("value", "cookie", "trailer")
    for what in ("space_in_front", "space_behind", "tab_in_front", "tab_behind", "space_alone")
]

ENVOY_DIFFERS: dict[str, str] = {
    # §5.1 lets a server discard what comes on a closed stream; these could not have crossed the frame that closed it.
    "5.1_closed_data": "discards it",
    "5.1_closed_headers": "discards it",
    "5.1_closed_trailers": "discards it",
    "5.1_skipped_data": "discards it",
    "5.1.1_lower_than_an_open_stream": "discards the request, which is never answered",
    "5.1.1_lower_than_a_closed_stream": "discards the request, which is never answered",
    "5.1.1_lower_than_a_stream_that_was_reset": "discards the request, which is never answered",
    "5.1.1_lower_than_a_stream_that_was_refused": "discards the request, which is never answered",
    "test_5_1_2_stream_over_the_advertised_number_is_refused_and_only_it": "closes the connection, with all streams",
    "6.3_priority_on_stream_0": "ignores it",
    **dict.fromkeys(_WHITE_SPACE, "takes white space around values, and strips it"),
    # A SHOULD of §8.3.1. What :authority says is what Envoy forwards as Host.
    "8.3.1_host_differs_from_authority": "takes :authority and drops Host",
    "8.3.1_host_differs_by_its_port": "takes :authority and drops Host",
    "8.3.1_authority_with_no_port": "checks characters, not the port",
    "8.3.1_authority_with_two_ports": "checks characters, not the port",
    # Not the protocol's doing: routes match paths, and trailers to HTTP/1.1 are an option.
    "test_8_3_1_asterisk_of_options": "404: no route matches *",
    "test_8_1_body_and_trailers_are_forwarded": "drops trailers towards HTTP/1.1 unless configured",
    "6.9.2_initial_size_makes_a_window_overflow": "takes it",
    "6.8_open_stream_ends_well_after_goaway_twice": "closes the connection, with the request that is open",
    "test_3_4_preface_in_single_bytes": "resets: its codec_type AUTO decides by what the first read brings",
    "4.2_continuation_too_large": "serves the request: SETTINGS_MAX_FRAME_SIZE does not hold for CONTINUATION",
}
