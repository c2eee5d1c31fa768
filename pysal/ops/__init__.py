"""The ops, one card per file: schema, fake, autograd and the documented wrapper."""

from pysal._interrupts import held_back

with held_back():  # an op cannot be registered again, nor be done without
    from pysal._library import build_info  # reached through here, so that it knows every op
    from pysal.ops.box_regions import box_regions, box_regions_depthwise, box_regions_sums
    from pysal.ops.epilogue import epilogue_, epilogue_backward_
    from pysal.ops.gaussian_noise import gaussian_noise, gaussian_noise_bits
    from pysal.ops.gaussian_scale_space import gaussian_scale_space, gaussian_scale_space_derivative
    from pysal.ops.grad_cam import grad_cam
    from pysal.ops.guided_relu import guided_relu, guided_relu_backward, guided_relu_backward_, guided_relu_gates
    from pysal.ops.occlusion_masks import (
        occlusion_masks,
        occlusion_masks_boxes,
        occlusion_masks_boxes_map,
        occlusion_masks_map,
    )
    from pysal.ops.path_integral import (
        path_integral_accumulate_,
        path_integral_moments_,
        path_integral_points,
        path_integral_product,
    )

__all__ = [
    "box_regions",
    "box_regions_depthwise",
    "box_regions_sums",
    "build_info",
    "epilogue_",
    "epilogue_backward_",
    "gaussian_noise",
    "gaussian_noise_bits",
    "gaussian_scale_space",
    "gaussian_scale_space_derivative",
    "grad_cam",
    "guided_relu",
    "guided_relu_backward",
    "guided_relu_backward_",
    "guided_relu_gates",
    "occlusion_masks",
    "occlusion_masks_boxes",
    "occlusion_masks_boxes_map",
    "occlusion_masks_map",
    "path_integral_accumulate_",
    "path_integral_moments_",
    "path_integral_points",
    "path_integral_product",
]
