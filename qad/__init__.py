"""qad: train a student on the very grid that the device stores.

Importing this package stays light; heavy libraries are imported by the modules that need them.
"""

import os

# Set before any library that reads them is imported: TRL pings its makers once per trainer, and ONNX Runtime keeps an
# identifier of the machine and sends it events. qad does neither.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
