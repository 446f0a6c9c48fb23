"""What the feature interfaces of isotropic and hierarchical models share."""
from typing import List, Optional, Tuple, Union

from timm.models._features import feature_take_indices


def take_indices(num_features: int, indices: Optional[Union[int, List[int]]]) -> Tuple[List[int], int]:
    """timm's `feature_take_indices`: the indices wanted and the last of them.

    Raises:
        ValueError: There are none.
    """
    if indices is not None and not isinstance(indices, int) and len(indices) == 0:
        raise ValueError(f'indices: got {indices}, needs at least one of 0 to {num_features - 1}')
    return feature_take_indices(num_features, indices)
