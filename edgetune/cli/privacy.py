"""`edgetune privacy`: how much noise an epsilon takes, and what a noise proves."""

import click

from edgetune.cli.output import echo_json


@click.command("privacy")
@click.option("--epsilon", type=float, help="Find the noise for this.")
@click.option("--noise-multiplier", type=float, metavar="S", help="Find the epsilon of this.")
@click.option("--delta", type=float, default=1e-6, show_default=True, help="Less than 1 / samples.")
@click.option(
    "--releases", type=int, default=1, show_default=True,
    help="How often a device will send what it learned: each tells of the same samples again.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    epsilon: float | None, noise_multiplier: float | None, delta: float, releases: int,
    as_json: bool,
) -> None:  # fmt: skip
    """Calibrate the noise of `edgetune-rt export-learned`, for one sample of a device.

    \b
    Examples:
      edgetune privacy --epsilon 4 --releases 12
      edgetune privacy --noise-multiplier 10 --delta 1e-5
    """  # noqa: D301
    from edgetune.export.privacy import epsilon_of, noise_multiplier_for

    if (epsilon is None) == (noise_multiplier is None):
        raise click.UsageError("expected one of --epsilon and --noise-multiplier")
    if releases < 1:
        raise click.UsageError(f"--releases: expected 1 or more, got {releases}")
    if noise_multiplier is None:
        assert epsilon is not None
        noise_multiplier = noise_multiplier_for(epsilon, delta, releases=releases)
    proven = epsilon_of([noise_multiplier] * releases, delta)
    if as_json:
        echo_json(
            {
                "epsilon": proven,
                "delta": delta,
                "releases": releases,
                "noise_multiplier": noise_multiplier,
            }
        )
        return
    times = "release" if releases == 1 else "releases"
    click.echo(
        f"--noise-multiplier {noise_multiplier:.4g}: {releases} {times} of a sample are"
        f" ({proven:.3g}, {delta:g})-differentially private, sample by sample"
    )
