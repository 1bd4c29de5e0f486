"""The model card: what a person who finds the bundle needs to know."""

from edgetune.runtime.manifest import Evaluation, Manifest


def model_card(
    manifest: Manifest,
    *,
    base_model: str,
    method: str,
    torch: Evaluation,
    parity: float,
    verdict: str,
    ladder: str,
) -> str:
    """Return MODEL_CARD.md for a bundle whose manifest is complete but for the files.

    Args:
        manifest: of the bundle.
        base_model: what was fine-tuned.
        method: how.
        torch: the same split, measured in torch before export.
        parity: largest difference of a logit between torch and the fp32 graph.
        verdict: what came of the search, a sentence.
        ladder: the candidates that were tried, as a Markdown table.
    """
    rows = "\n".join(
        f"| {name} | {_cells(torch, name)} | {_cells(manifest.reference, name)} |"
        f" {_cells(manifest.evaluation, name)} |"
        for name in manifest.evaluation.metrics
    )
    overrides = (
        f"\nLimits that were overridden when this was made: {', '.join(manifest.overrides)}.\n"
        if manifest.overrides
        else ""
    )
    return f"""# {manifest.name}

{manifest.task}, {_outputs(manifest)}, {manifest.precision}, made for the profile
`{manifest.profile}` by edgetune {manifest.edgetune_version}.

- base model: {base_model}
- fine-tuned with: {method}
- needs: onnxruntime {manifest.compatibility.onnxruntime_min} or newer
- labels: {", ".join(manifest.labels)}

## Measured

On {manifest.evaluation.samples} samples of the {manifest.evaluation.split} split; 95 % bootstrap
intervals in brackets. The last two columns were measured through the device runtime.

| metric | torch fp32 | ONNX fp32 | this bundle |
|---|---|---|---|
{rows}

The fp32 graph's logits are within {parity:.2g} of torch's on real samples, preprocessing
included.

## How it was chosen

{verdict[0].upper()}{verdict[1:]}. {_judged(manifest)} here
are of the validation split, compared sample by sample with fp32; "at most" holds with 95 %
confidence.

{ladder}
{overrides}
## Self-test

`edgetune-rt verify` checks every file's SHA-256 and replays {manifest.goldens.count} samples,
whose logits may differ by {manifest.goldens.tolerance:.3g} from those stored.

## Limits

The metrics hold for data like that split. What the training data lacked, the model has not
learned; {_scores(manifest)}
"""


def _judged(manifest: Manifest) -> str:
    return "Errors" if "mae" in manifest.evaluation.metrics else "Accuracy and loss"


def _outputs(manifest: Manifest) -> str:
    number = len(manifest.labels)
    return f"{number} labels" if number != 1 else "1 output"


def _scores(manifest: Manifest) -> str:
    calibration, abstention = manifest.calibration, manifest.abstention
    text = (
        "a value comes without an interval."
        if "mae" in manifest.evaluation.metrics
        else "scores are not calibrated probabilities."
    )
    if calibration is not None:
        text = (
            f"scores are divided by a temperature of {calibration.temperature:.4g}, fitted on"
            f" {calibration.samples} validation samples\n(expected calibration error"
            f" {calibration.ece_before:.4f} without it, {calibration.ece_after:.4f} with it)."
        )
    if abstention is not None:
        text += (
            f"\nAnswers of a score below {abstention.threshold:.4f} are marked as abstained; of the"
            f" others, {100 * abstention.coverage:.1f} % of the\nvalidation samples, at least"
            f" {100 * abstention.low:.2f} % are right, with 95 % confidence."
        )
    return text


def _cells(evaluation: Evaluation, name: str) -> str:
    metric = evaluation.metrics[name]
    return f"{metric.value:.4f} [{metric.low:.4f}, {metric.high:.4f}]"
