import torch

from methods.adam import Adam


def test_same_bits_as_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    start, target = torch.randn(2, 7, 5, generator=generator)
    theirs, ours = start.clone(), start.clone()
    peer, adam = torch.optim.Adam([theirs], lr=0.01), Adam(ours, lr=0.01)
    for _ in range(20):
        theirs.grad = 2 * (theirs - target)
        peer.step()
        gradient = 2 * (ours - target)
        adam.step(gradient)
        assert torch.equal(ours, theirs)


def test_gradient_is_left_as_it_is() -> None:
    gradient = torch.tensor([1.0, -3.0])
    Adam(torch.zeros(2), lr=0.1).step(gradient)
    assert gradient.tolist() == [1.0, -3.0]
