"""qad: train a student on the very grid that the device stores.

Importing this package stays light; heavy libraries are imported by the modules that need them.
"""

__version__ = "0.1.0"
