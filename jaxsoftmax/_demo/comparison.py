"""Training and judging one model after the other, with a progress bar on stderr."""

from collections.abc import Callable

from tqdm import tqdm

from jaxsoftmax._demo.digits import Digits
from jaxsoftmax._demo.evaluation import Result, evaluate
from jaxsoftmax._demo.models import Model
from jaxsoftmax._demo.training import Epoch, train

_BAR_FORMAT = "{desc} {percentage:3.0f}% |{bar}| epoch {n_fmt}/{total_fmt}, {elapsed}{postfix}"


def compare(
    models: list[Model],
    digits: Digits,
    *,
    epochs: int,
    seed: int,
    quiet: bool,
    checkpoint: Callable[[], None],
) -> list[Result]:
    """Trains and judges each model.

    Args:
      models: The models to compare.
      digits: What they learn from and are judged on.
      epochs: How long each is trained.
      seed: Decides everything random, and the same for each.
      quiet: Whether to show no bar.
      checkpoint: Called often, at moments when it may safely raise.

    Returns:
      One result per model.
    """
    width = max(len(model.name) for model in models)

    def run(model: Model) -> Result:
        with tqdm(
            total=epochs,
            desc=model.name.ljust(width),
            disable=quiet,
            bar_format=_BAR_FORMAT,
            dynamic_ncols=True,
        ) as bar:

            def advance(epoch: Epoch) -> None:
                bar.set_postfix_str(f"validation {epoch.accuracy:.1%}", refresh=False)
                bar.update()
                checkpoint()

            trained = train(model.loss, digits, epochs=epochs, seed=seed, on_epoch=advance)
        result = evaluate(model, trained, digits)
        checkpoint()
        return result

    return [run(model) for model in models]
