"""The ops of emitted programs, in the torch library namespace `shardwright`. They import torch alone."""

from . import attention, collectives, embedding, experts, gradient, loops, losses, random
from .collectives import (
    Communicator,
    StaticCommunicator,
    communicator,
    library,
    ops,
    use_communicator,
)

__all__ = [
    "Communicator",
    "StaticCommunicator",
    "attention",
    "collectives",
    "communicator",
    "embedding",
    "experts",
    "gradient",
    "library",
    "loops",
    "losses",
    "ops",
    "random",
    "use_communicator",
]
