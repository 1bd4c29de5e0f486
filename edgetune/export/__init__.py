"""From a run to a bundle: graph, parity, quantization, gate, pack."""

from edgetune.export.bundle import ExportResult, export

__all__ = ["ExportResult", "export"]
