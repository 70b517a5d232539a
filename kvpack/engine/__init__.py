"""Run the work of codecs as tasks with tickets: here on CPU threads, and on a GPU in :mod:`kvpack.gpu.engine`."""

from kvpack.engine.cpu import CpuEngine
from kvpack.engine.tasks import DecodeTask, Done, EncodeTask, Engine, Room, Task, Ticket
from kvpack.engine.threads import Progress, Workers, available_threads
from kvpack.engine.turn import InTurn, awaited

__all__ = [
    "CpuEngine",
    "DecodeTask",
    "Done",
    "EncodeTask",
    "Engine",
    "InTurn",
    "Progress",
    "Room",
    "Task",
    "Ticket",
    "Workers",
    "available_threads",
    "awaited",
]
