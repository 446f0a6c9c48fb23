"""torch.compile: one graph for all batch and image sizes, and the training step of the model itself."""
import pytest
import torch

from .test_families import FAMILIES, build


@pytest.mark.parametrize(
    'family', [f if f == 'videomamba' else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_compiles_once(family):
    model, (*dims, height, width) = build(family)
    if hasattr(model, 'dynamic_img_size'):
        model.set_input_size(dynamic_img_size=True)
    step = model.feature_info[-1]['reduction']
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend=backend)
    with torch.no_grad():
        for batch, rows, cols in ((2, 0, step), (3, step, 0), (5, step, 3 * step)):
            x = torch.randn(batch, *dims, height + rows, width + cols)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


@pytest.mark.slow  # compiles for a minute
@pytest.mark.parametrize('family', ['videomamba', 'mambavision', 'groupmamba'])
def test_training_step(family):
    """By Inductor: the loss and all parameters after a step of SGD."""
    model, input_size = build(family)
    x, target = torch.randn(4, *input_size), torch.tensor([0, 1, 2, 3])
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def step(run):
        model.load_state_dict(start)
        model.eval()  # no random depth
        optimizer = torch.optim.SGD(model.parameters(), lr=.1)
        loss = torch.nn.functional.cross_entropy(run(x), target)
        loss.backward()
        optimizer.step()
        model.zero_grad()
        return loss.detach(), {name: value.clone() for name, value in model.state_dict().items()}

    torch.testing.assert_close(step(torch.compile(model, fullgraph=True)), step(model), rtol=1e-4, atol=1e-5)
