import torch

from dpdmd_pipeline.metrics.passes import Passes


def test_the_cpu_runs_one_picture_at_a_time_on_one_thread():
    calls = []

    def network(images):
        calls.append((len(images), torch.get_num_threads()))
        return torch.tensor([[float(image)] for image in images])

    before = torch.get_num_threads()
    rows = Passes("cpu", 64).run(network, [3, 1, 2])
    assert rows.tolist() == [[3], [1], [2]] and calls == [(1, 1)] * 3
    assert torch.get_num_threads() == before
