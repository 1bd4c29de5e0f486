"""edgetune: from a pretrained model and your data to a model that runs on an edge device.

What the command line does, these do with the same words:

    from edgetune.config import load_config
    from edgetune.data import check_dataset, load_dataset
    from edgetune.train import resume, train
    from edgetune.export import export
    from edgetune.bench.evaluate import evaluate
    from edgetune.bench.latency import bench
    from edgetune.runtime import EdgeModel
"""

__version__ = "0.1.0"
