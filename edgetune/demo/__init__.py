"""The demo: real data to a device, start to end, in a few minutes."""

from edgetune.demo.demo import DemoResult, demo

__all__ = ["DemoResult", "demo"]
