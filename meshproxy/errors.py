"""The three families of error. Everything the proxy raises on purpose is one of them."""


class MeshproxyError(Exception):
    """Root of all errors raised on purpose."""


class ConfigError(MeshproxyError):
    """The operator can fix it; the text is one sentence that says which file, line and field."""


class RemoteProtocolError(MeshproxyError):
    """The other side broke a rule: answer or close, count, never a traceback.

    detail: Envoy-style `response_code_details` word, e.g. `http1.duplicate_content_length`.
    """

    def __init__(self, detail: str, status: int = 400) -> None:
        super().__init__(detail)
        self.detail = detail
        self.status = status


class LocalProtocolError(MeshproxyError):
    """We broke a rule: a bug. Log it with its traceback."""
