"""The one error of capture."""


class CaptureError(RuntimeError):
    """The model cannot be captured faithfully: the cause, the source line, and the way out."""

    def __init__(self, cause: str, source: str | None, way_out: str) -> None:
        self.cause, self.source, self.way_out = cause, source, way_out
        super().__init__(f"{cause}\n  at {source}\n  {way_out}" if source else f"{cause}\n  {way_out}")
