"""Pages that people look at: ``kvpack bench --html`` and ``kvpack verify --html``, each one file that needs no network.

Charts are drawn in the browser by Vega-Lite, which the package ``vl-convert-python`` (the extra ``html``) brings.
"""

from kvpack.bench.html.bench import bench_page
from kvpack.bench.html.library import javascript
from kvpack.bench.html.made import Made
from kvpack.bench.html.verify import Verified, verify_page

__all__ = ["Made", "Verified", "bench_page", "javascript", "verify_page"]
