"""Hint methods: a loss and, where channels must be matched, an adapter on the student's side.

A method is an `nn.Module` for one pair (student layer, teacher layer), built from the two shapes, called with the two
features. Its parameters, if any, are trained with the student and are no part of the student that is saved.
To add a method: a loss in `losses`, a class here, a line in METHODS, a test.
"""

from torch import Tensor, nn

from pursuhint_lib.losses import at_loss, hint_mse, match_size

Shape = tuple[int, int, int]  # channels, height, width


class AttentionTransfer(nn.Module):
    """AT: the student should look where the teacher looks. No parameters; any two shapes."""

    published_weight = 1000.0  # per pair; the benchmark's, see `losses.at_loss` for the scale that it belongs to

    def __init__(self, student_shape: Shape, teacher_shape: Shape):
        super().__init__()

    def forward(self, student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
        """(B, Cs, Hs, Ws), (B, Ct, Ht, Wt) -> scalar."""
        return at_loss(*match_size(student_feature, teacher_feature))


class FitNet(nn.Module):
    """FitNet: a linear image of the student's feature should equal the teacher's feature.

    The regressor is a 1x1 convolution with batch norm. It ends without an activation, so that targets from before an
    activation can be met as well (the benchmark's code ends with a ReLU and can meet only positive ones).
    """

    published_weight = 100.0

    def __init__(self, student_shape: Shape, teacher_shape: Shape):
        super().__init__()
        self.regressor = nn.Sequential(
            nn.Conv2d(student_shape[0], teacher_shape[0], kernel_size=1, bias=False),
            nn.BatchNorm2d(teacher_shape[0]),
        )

    def forward(self, student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
        """(B, Cs, Hs, Ws), (B, Ct, Ht, Wt) -> scalar."""
        student_feature, teacher_feature = match_size(student_feature, teacher_feature)
        return hint_mse(self.regressor(student_feature), teacher_feature)


METHODS: dict[str, type[nn.Module]] = {"at": AttentionTransfer, "fitnet": FitNet}
