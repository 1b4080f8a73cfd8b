import copy

import pytest
import torch

from methods.corrections import Correction
from methods.surgery import SurgeryParams, SurgeryV2Params, surgery, surgery_v2
from tests.methods.test_we_moe import INPUTS, Model, Roles, models, task_arithmetic

INPUT = {"pixel_values": INPUTS}


def built(base: Model, experts: list[Model], make=surgery, kind=SurgeryParams, **params) -> torch.nn.Module:
    torch.manual_seed(0)
    return make(copy.deepcopy(base), experts, kind(**params), Roles())


def test_by_hand() -> None:
    """h = (1, -2), down (1, 1) and (1, -1), up (2, 0) and (0, 1): h - up relu(down h) = (1, -2) - (0, 3)."""
    correction = Correction(2, 2, 1)
    correction.task = 0
    with torch.no_grad():
        correction.down.copy_(torch.tensor([[[1.0, 1.0], [1.0, -1.0]]]))
        correction.up.copy_(torch.tensor([[[2.0, 0.0], [0.0, 1.0]]]))
        assert correction.see(correction, (), torch.tensor([[1.0, -2.0]])).tolist() == [[1.0, -5.0]]
        assert correction.see(correction, (), (torch.tensor([[1.0, -2.0]]), "rest"))[1] == "rest"


@pytest.mark.parametrize(("make", "kind", "n"), [(surgery, SurgeryParams, 1), (surgery_v2, SurgeryV2Params, 2)])
def test_untaught_it_is_task_arithmetic_and_taught_it_is_nearer_to_every_expert(make, kind, n) -> None:
    base, experts = models()
    module = built(base, experts, make, kind)
    assert len(module.corrections) == n
    merged = task_arithmetic(base, experts, [0.3] * 3)(INPUTS)
    for task in (None, "bee"):
        torch.testing.assert_close(module.of(task)(**INPUT), merged)
    trainable = [own for own in module.parameters() if own.requires_grad]
    assert sum(own.numel() for own in trainable) == sum(own.numel() for own in module.corrections.parameters())
    optimizer = torch.optim.Adam(trainable, lr=0.02)
    first = None
    for _ in range(150):
        optimizer.zero_grad()
        loss = sum(module.lesson.loss(module, task, INPUT).mean() for task in range(3))
        loss.backward()
        optimizer.step()
        first = first or loss.item()
    assert loss.item() < 0.5 * first
    module.lesson.finish(module)
    torch.testing.assert_close(module(**INPUT), merged)
    for task, expert in zip(Roles.experts, experts, strict=True):
        away = (module.of(task)(**INPUT) - expert(INPUTS)).abs().mean().detach()
        assert float(away) < 0.6 * float((merged - expert(INPUTS)).detach().abs().mean())
    assert module.lesson.experts == []


def test_a_task_that_is_not_there() -> None:
    base, experts = models()
    with pytest.raises(ValueError, match="corrections are there for ant, bee, cat; got 'dog'"):
        built(base, experts).of("dog")


def test_an_architecture_without_blocks_is_refused() -> None:
    class Without(Roles):
        def points(self) -> tuple[str, ...]:
            return ()

    base, experts = models()
    with pytest.raises(ValueError, match="surgery corrects blocks' outputs, and this architecture has none"):
        surgery(base, experts, SurgeryParams(), Without())


def test_params_are_checked() -> None:
    with pytest.raises(ValueError, match="rank must be at least 1"):
        SurgeryParams(rank=0)
