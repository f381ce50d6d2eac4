import torch

from dpdmd_pipeline.metrics.passes import Passes


def test_on_the_cpu_one_picture_goes_through_at_a_time_on_one_thread():
    seen = []

    def network(images):
        seen.append((len(images), torch.get_num_threads()))
        return torch.tensor([[float(image)] for image in images])

    before = torch.get_num_threads()
    found = Passes("cpu", 64).run(network, [3, 1, 2])
    assert found.tolist() == [[3], [1], [2]] and seen == [(1, 1)] * 3
    assert torch.get_num_threads() == before
