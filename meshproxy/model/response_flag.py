"""Why a response is not simply the upstream's. Source: Envoy access log %RESPONSE_FLAGS%."""

from enum import Enum


class ResponseFlag(str, Enum):
    """Envoy's short names. NONE is written `-` in logs and metrics."""

    NONE = "-"
    NO_HEALTHY_UPSTREAM = "UH"
    UPSTREAM_CONNECTION_FAILURE = "UF"
    UPSTREAM_OVERFLOW = "UO"
    NO_ROUTE = "NR"
    RETRY_LIMIT = "URX"
    NO_CLUSTER = "NC"
    DURATION_TIMEOUT = "DT"
    DOWNSTREAM_CLOSED = "DC"
    UPSTREAM_TIMEOUT = "UT"
    LOCAL_RESET = "LR"
    UPSTREAM_RESET = "UR"
    UPSTREAM_CLOSED = "UC"
    STREAM_IDLE = "SI"
    DOWNSTREAM_PROTOCOL_ERROR = "DPE"
    UPSTREAM_PROTOCOL_ERROR = "UPE"
    OVERLOAD = "OM"
