"""The schedule of a run: a recipe's lengths, rate and averaging, fitted to its data, batch, processes and length."""

import math
from collections.abc import Collection

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from common.averaging import horizon_scaled
from common.errors import UserError

WARMUP = ("SOLVER.WARMUP_ITERS", "SOLVER.WARMUP_EPOCHS")


def scale_to_processes(cfg: CfgNode, processes: int) -> CfgNode:
    """The recipe with batch, rate, lengths in iterations and averaging scaled to so many processes.

    A process that accumulates gradients counts as many times as it does.

    Raises:
        UserError: its batch cannot be shared among the processes that it is written for.
    """
    written_for = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if written_for and cfg.SOLVER.IMS_PER_BATCH % written_for:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH}: expected a multiple of SOLVER.REFERENCE_WORLD_SIZE "
            f"{written_for}, the processes that the recipe is written for"
        )
    scaled = DefaultTrainer.auto_scale_workers(cfg, processes)
    before, after = cfg.SOLVER.IMS_PER_BATCH, scaled.SOLVER.IMS_PER_BATCH
    scaled.INPUT.CLOSE_ITERS = round(cfg.INPUT.CLOSE_ITERS * before / after)
    scaled.SOLVER.EMA_DECAY = horizon_scaled(cfg.SOLVER.EMA_DECAY, after, before)
    return scaled


def resolve_schedule(
    cfg: CfgNode,
    recipe: CfgNode,
    given: Collection[str],
    num_images: int,
    leaf: tuple[CfgNode, Collection[str]] | None = None,
) -> None:
    """Writes all lengths in iterations, in place, beside those in epochs.

    A run that is shorter or longer than its recipe is the same recipe, shorter or longer: the steps of the rate, the
    warm-up and the closing phase keep their shares of it unless they are given. The average of the weights forgets as
    fast, counted in images, as in the recipe. For keys that a file of the user's own sets, that file is the recipe.

    Args:
        cfg: the configuration of the run, with its batch.
        recipe: the configuration before the user changed it.
        given: keys that the user has set over it.
        num_images: images in one pass over the training data.
        leaf: what a file of the user's own makes of the recipe before those keys, and the keys that the file sets.

    Raises:
        UserError: a length or the batch size is not positive.
    """
    for key in ("IMS_PER_BATCH", "CHECKPOINT_PERIOD", "LOG_PERIOD"):
        if cfg.SOLVER[key] < 1:
            raise UserError(f"SOLVER.{key} {cfg.SOLVER[key]}: expected 1 or more")
    layers = [(cfg, given), *([leaf] if leaf else [])]

    def written_for(*keys: str) -> CfgNode:
        """The configuration that one of these keys was last set in."""
        return next((node for node, own in layers if not set(keys).isdisjoint(own)), recipe)

    before = written_for("SOLVER.EMA_DECAY").SOLVER
    cfg.SOLVER.EMA_DECAY = horizon_scaled(before.EMA_DECAY, cfg.SOLVER.IMS_PER_BATCH, before.IMS_PER_BATCH)

    def iterations(epochs: float) -> int:
        return max(1, math.ceil(epochs * num_images / cfg.SOLVER.IMS_PER_BATCH))

    def length(node: CfgNode) -> int:
        return iterations(node.SOLVER.MAX_EPOCHS) if node.SOLVER.MAX_EPOCHS else node.SOLVER.MAX_ITER

    cfg.SOLVER.MAX_ITER = length(cfg)
    if cfg.SOLVER.MAX_ITER < 1 or cfg.SOLVER.MAX_EPOCHS < 0:
        raise UserError(
            f"SOLVER.MAX_EPOCHS {cfg.SOLVER.MAX_EPOCHS:g}, SOLVER.MAX_ITER {cfg.SOLVER.MAX_ITER}: expected more than 0"
        )

    def stretch(*keys: str) -> float:
        """How many times as long the run is as the one that lengths of these keys were written for."""
        return cfg.SOLVER.MAX_ITER / length(written_for(*keys))

    factor = stretch("SOLVER.STEPS", "SOLVER.STEPS_EPOCHS")
    cfg.SOLVER.STEPS = tuple(round(step * factor) for step in cfg.SOLVER.STEPS)
    cfg.SOLVER.STEPS_EPOCHS = [epochs * factor for epochs in cfg.SOLVER.STEPS_EPOCHS]
    factor = stretch(*WARMUP)
    cfg.SOLVER.WARMUP_ITERS = math.ceil(cfg.SOLVER.WARMUP_ITERS * factor)
    cfg.SOLVER.WARMUP_EPOCHS *= factor
    factor = stretch("INPUT.CLOSE_ITERS", "INPUT.CLOSE_EPOCHS")
    cfg.INPUT.CLOSE_ITERS = math.ceil(cfg.INPUT.CLOSE_ITERS * factor)
    cfg.INPUT.CLOSE_EPOCHS *= factor

    if cfg.SOLVER.STEPS_EPOCHS:
        cfg.SOLVER.STEPS = tuple(iterations(epochs) for epochs in cfg.SOLVER.STEPS_EPOCHS)
    # Of a very short run several may fall together.
    cfg.SOLVER.STEPS = tuple(sorted({step for step in cfg.SOLVER.STEPS if 0 < step < cfg.SOLVER.MAX_ITER}))
    if cfg.SOLVER.WARMUP_EPOCHS:
        # Of a recipe's two lengths the shorter counts: on few images the one in iterations would be the whole run.
        # Where the one in epochs was set later, without the other, it alone counts.
        last_set = next((set(WARMUP) & {*own} for _, own in layers if set(WARMUP) & {*own}), WARMUP)
        limit = cfg.SOLVER.WARMUP_ITERS if WARMUP[0] in last_set else cfg.SOLVER.MAX_ITER
        cfg.SOLVER.WARMUP_ITERS = min(iterations(cfg.SOLVER.WARMUP_EPOCHS), limit)
    cfg.SOLVER.WARMUP_ITERS = min(cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.MAX_ITER)
    if cfg.INPUT.CLOSE_EPOCHS:
        cfg.INPUT.CLOSE_ITERS = iterations(cfg.INPUT.CLOSE_EPOCHS)
    if cfg.TEST.EVAL_EPOCHS:
        cfg.TEST.EVAL_PERIOD = iterations(cfg.TEST.EVAL_EPOCHS)


def describe_schedule(cfg: CfgNode) -> str:
    """One line on a resolved schedule."""
    parts = [f"{cfg.SOLVER.MAX_ITER} iterations of {cfg.SOLVER.IMS_PER_BATCH} images, rate {cfg.SOLVER.BASE_LR:g}"]
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupCosineLR":
        parts.append("on a cosine")
    elif cfg.SOLVER.STEPS:
        parts.append(f"times {cfg.SOLVER.GAMMA:g} at {', '.join(map(str, cfg.SOLVER.STEPS))}")
    parts.append(f"warm-up {cfg.SOLVER.WARMUP_ITERS}")
    if cfg.INPUT.CLOSE_ITERS:
        parts.append(f"closing phase {cfg.INPUT.CLOSE_ITERS}")
    if cfg.SOLVER.EMA_DECAY:
        parts.append(f"averaging {cfg.SOLVER.EMA_DECAY:.6g}")
    return ", ".join(parts)
