"""meshproxy: a service-mesh data plane for edge hosts. Importing the package starts nothing."""

__version__ = "0.1.0"
