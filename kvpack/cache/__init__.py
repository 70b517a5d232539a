"""What a cache is, whichever file or program it comes from: its tensors, and windows of its tokens."""

from kvpack.cache.spec import CacheSpec, PartSpec, Role, TensorInfo, WindowSpec, count_parts, windows
from kvpack.cache.window import Window

__all__ = ["CacheSpec", "PartSpec", "Role", "TensorInfo", "Window", "WindowSpec", "count_parts", "windows"]
