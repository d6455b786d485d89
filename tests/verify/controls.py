"""Mistakes that engines have been known to make, put into ours: what `trace` takes as `make`."""

from __future__ import annotations

from functools import partial

from moe.train.loop import build_engine


def expert_gradients_times_ranks(recipe, model, mesh):
    """The gradient of experts is summed as if it were an average: too large by the ranks that share them out."""
    engine = build_engine(recipe, model, mesh)
    gradients = engine.gradients

    def wrong():
        for name in engine.shared_out:
            _local(engine.parameters[name].grad).mul_(mesh.expert_ranks)
        return gradients()

    engine.gradients = wrong
    return engine


def router_gradients_of_one_rank(recipe, model, mesh):
    """The gradient of routers is never summed over ranks."""
    engine = build_engine(recipe, model, mesh)
    gradients, own = engine.gradients, {}
    for name, p in model.named_parameters():
        if name in engine.of_routers:
            p.register_hook(partial(own.__setitem__, name))

    def wrong():
        for name, gradient in own.items():
            engine.parameters[name].grad.copy_(gradient)
        return gradients()

    engine.gradients = wrong
    return engine


def norm_without_experts(recipe, model, mesh):
    """The norm by which gradients are clipped leaves out the experts that this rank has to itself."""
    engine = build_engine(recipe, model, mesh)
    counted = engine.counted
    of_experts = {id(bucket.sum) for lane in engine.lanes if lane.group is not None for bucket in lane.buckets}
    assert of_experts
    engine.counted = lambda gradients: [g for g in counted(gradients) if id(g) not in of_experts]
    return engine


def auxiliary_loss_times_accumulation(recipe, model, mesh):
    """The auxiliary loss of every micro-batch counts as if it were that of the batch."""
    engine = build_engine(recipe, model, mesh)
    for router in engine.routers:
        router.register_forward_hook(lambda _, __, routing: routing._replace(loss=routing.loss * recipe.train.accumulate))
    return engine


def router_state_of_one_rank(recipe, model, mesh):
    """Routers learn from the load of their own rank."""
    engine = build_engine(recipe, model, mesh)
    for router in engine.routers:
        update = router.update
        router.update = lambda load, tokens, update=update: update(load.roll(mesh.rank + 1), tokens)
    return engine


def _local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
