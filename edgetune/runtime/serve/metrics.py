"""What the server counts."""

import time
from collections.abc import Sequence

from edgetune import __version__
from edgetune.runtime.manifest import Manifest
from edgetune.runtime.measure import rss_mib
from edgetune.runtime.serve.prometheus import Counter, Family, Histogram, Sample, gauge

# seconds, from a small text model on a laptop to a large one on a small board
LATENCY_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Counters of one server. Their labels take few values: known paths, the bundle's labels."""

    def __init__(self, manifest: Manifest) -> None:
        """Start at zero, with every label that the bundle can give."""
        self.started = time.time()
        self.requests = Counter(
            "edgetune_http_requests_total", "Requests answered.", ("path", "status")
        )
        self.rejected = Counter(
            "edgetune_requests_rejected_total", "Requests for which there was no room.", ("reason",)
        )
        self.predictions = Counter("edgetune_predictions_total", "Samples answered.", ("label",))
        self.request_seconds = Histogram(
            "edgetune_predict_request_duration_seconds",
            "From the head of a request for /predict to its answer, sent.",
            LATENCY_BOUNDS,
        )
        self.prediction_seconds = Histogram(
            "edgetune_prediction_duration_seconds",
            "Decoding and predicting, for all samples of a request, time in the queue left out.",
            LATENCY_BOUNDS,
        )
        for reason in ("queue_full", "late", "connections"):
            self.rejected.set_zero(reason)
        for label in manifest.labels:
            self.predictions.set_zero(label)
        self.usual_s = 0.0
        self._bundle = {
            "name": manifest.name,
            "release": str(manifest.release),
            "digest": manifest.digest,
            "task": manifest.task,
            "precision": manifest.precision,
        }

    def predicted(self, labels: Sequence[str], seconds: float) -> None:
        """Count one answered request for /predict."""
        self.prediction_seconds.observe(seconds)
        for label in labels:
            self.predictions.add(label)
        self.usual_s = 0.8 * self.usual_s + 0.2 * seconds if self.usual_s else seconds

    def families(self) -> list[Family]:
        """Return everything that is counted here, and what the process says of itself."""
        families = [
            self.requests.family(),
            self.request_seconds.family(),
            self.prediction_seconds.family(),
            self.predictions.family(),
            self.rejected.family(),
            gauge("edgetune_bundle_info", "What is served; 1.", 1, self._bundle),
            gauge("edgetune_build_info", "This edgetune; 1.", 1, {"version": __version__}),
            gauge("process_start_time_seconds", "When serving began, Unix time.", self.started),
            Family(
                name="process_cpu_seconds_total",
                kind="counter",
                help="CPU time, user and system.",
                samples=[Sample(value=time.process_time(), labels={})],
            ),
        ]
        if (resident := rss_mib()) is not None:
            name = "process_resident_memory_bytes"
            families.append(gauge(name, "Resident memory.", resident * 2**20))
        return families
