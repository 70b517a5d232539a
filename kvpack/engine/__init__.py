"""Runs the work of codecs: tasks with tickets, on the threads of a CPU here, on a GPU in :mod:`kvpack.gpu.engine`."""

from kvpack.engine.cpu import CpuEngine
from kvpack.engine.tasks import DecodeTask, Done, EncodeTask, Engine, Room, Task, Ticket
from kvpack.engine.threads import Progress, available_threads
from kvpack.engine.turn import InTurn

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
    "available_threads",
]
