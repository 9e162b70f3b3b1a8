"""The first names of what is in `_streaming.api`."""

from ._streaming.api import Gradients, Stream, StreamStatistics, stream

__all__ = ["Gradients", "Stream", "StreamStatistics", "stream"]
