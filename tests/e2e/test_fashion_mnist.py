"""Fashion-MNIST through the SDK: the seed's exact settings three times, and the recipe beside them."""

from __future__ import annotations

import numpy as np
import pytest

import cloister
from databases import DATA
from harness import Deployment

PATH = DATA / "fashion_mnist_train.npz"
KEPT_BACK = 5_000


@pytest.mark.long
@pytest.mark.skipif(not PATH.exists(), reason=f"{PATH.name} is not beside the repository")
def test_the_seed_network_reaches_55_percent_three_times(tmp_path_factory: pytest.TempPathFactory) -> None:
    with np.load(PATH) as file:
        images, labels = (file["images"] / np.float32(255)).astype(np.float32), file["labels"].astype(np.int32)
    deployment = Deployment(tmp_path_factory.mktemp("fashion"), chunk_steps=200, extra_env={"OMP_NUM_THREADS": "2"})
    deployment.init().start()
    try:
        app = deployment.app(deployment.tenant("acme"), "steward")
        with deployment.client(app, timeout_s=300) as client:
            data = client.datasets.upload(
                "fashion",
                {"image": images[KEPT_BACK:], "label": labels[KEPT_BACK:]},
                source=client.sources.create("people", epsilon=60, delta=1e-5),
                columns={
                    "image": cloister.Tensor(shape=(28, 28), low=0, high=1),
                    "label": cloister.Category(values=tuple("0123456789")),
                },
                nominal_size=55_000,
                capacity=60_000,
            )
            seed = client.plan(
                data,
                target="label",
                layers=[
                    cloister.layers.Flatten(),
                    cloister.layers.Linear(in_features=784, out_features=128),
                    cloister.layers.ReLU(),
                    cloister.layers.Linear(in_features=128, out_features=10),
                ],
                privacy=cloister.DP(noise_multiplier=1.0, clip=1.0),
                batch_size=256,
                epochs=10,
                optimizer=cloister.SGD(learning_rate=0.01),
            )
            recipe = client.plan(data, target="label", privacy=cloister.DP(epsilon=3))

            def accuracy(plan: cloister.Plan, name: str) -> float:
                model = client.train(plan, model=name).wait(timeout_s=900)
                return float(np.mean(model.predict(images[:KEPT_BACK]) == labels[:KEPT_BACK]))

            seeds = [accuracy(seed, f"seed-{run}") for run in range(3)]
            beside = accuracy(recipe, "recipe")
        print(f"seed settings, epsilon {seed.epsilon:.2f}: {seeds}; recipe, epsilon {recipe.epsilon:.2f}: {beside}")  # noqa: T201
        assert min(seeds) >= 0.55
        assert beside >= 0.80
    finally:
        deployment.kill()
