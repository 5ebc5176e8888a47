"""Lets a torchvision whose compiled operators do not fit this torch be imported without them.

The torchvision on PyPI is built for CUDA. Beside a CPU torch its operators (nms, roi_align, ...) cannot be loaded, and
its Python code then fails on describing operators that nobody declared. vLLM's image models import torchvision for its
image transforms, which need no such operator. So their names are declared here, just before torchvision is imported;
whoever calls one is told that it is not there.

`tools/repair_torchvision.sh` puts this file into the virtual environment, together with a .pth file that imports it at
every start of Python: vLLM's engines are processes of their own, and each imports torchvision.
"""

import sys

_OPERATORS = (
    *("nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"),
    *("_roi_align_backward", "_roi_pool_backward", "_ps_roi_align_backward", "_ps_roi_pool_backward"),
    "_deform_conv2d_backward",
)


class _BeforeTorchvision:
    """Finds no module. Is asked for every module before it is looked for, and acts when that is torchvision."""

    library = None  # the declarations last as long as it does

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and self.library is None:
            import torch

            self.library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in _OPERATORS:
                self.library.define(f"{operator}() -> ()")
        return None


sys.meta_path.insert(0, _BeforeTorchvision())
