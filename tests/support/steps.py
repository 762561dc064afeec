"""Steps of synchronous methods on models that compute their gradients themselves."""


def one_step(algorithm, local, state, exchange):
    """Do one step of training with the gradient that `local` computes; collective on all ranks."""
    for meanwhile in algorithm.phases(local, state, exchange):
        local.gradient(meanwhile)
