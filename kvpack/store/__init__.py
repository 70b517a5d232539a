"""A store of prefixes: caches of many texts on disk, in which beginnings that texts share are stored once.

``docs/store.md`` specifies the directory and says what is promised.
"""

from kvpack.store.collect import Collected, collect
from kvpack.store.get import Fetched, Prompt, get
from kvpack.store.place import Store
from kvpack.store.put import Stored, put
from kvpack.store.report import StoreReport, report, to_json
from kvpack.store.verify import Damage, Verified, verify

__all__ = [
    "Collected",
    "Damage",
    "Fetched",
    "Prompt",
    "Store",
    "StoreReport",
    "Stored",
    "Verified",
    "collect",
    "get",
    "put",
    "report",
    "to_json",
    "verify",
]
