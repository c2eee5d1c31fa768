"""What only pytorch-grad-cam has, and where it has ours."""

from pysal._elsewhere import Elsewhere

# Our classes: the module that each is in, and the peer's.
HOMES = {
    "AblationCAM": ("ablation_cam", "ablation_cam"),
    "AblationLayer": ("ablation_layer", "ablation_layer"),
    "AblationLayerFasterRCNN": ("ablation_layer", "ablation_layer"),
    "AblationLayerVit": ("ablation_layer", "ablation_layer"),
    "BaseCAM": ("base_cam", "base_cam"),
    "EigenCAM": ("eigen_cam", "eigen_cam"),
    "EigenGradCAM": ("eigen_grad_cam", "eigen_grad_cam"),
    "FEM": ("fem", "fem"),
    "FinerCAM": ("finer_cam", "finer_cam"),
    "FullGrad": ("fullgrad_cam", "fullgrad_cam"),
    "GradCAM": ("grad_cam", "grad_cam"),
    "GradCAMElementWise": ("grad_cam_elementwise", "grad_cam_elementwise"),
    "GradCAMPlusPlus": ("grad_cam_plusplus", "grad_cam_plusplus"),
    "GuidedBackpropReLUModel": ("guided_backprop", "guided_backprop"),
    "HiResCAM": ("hirescam", "hirescam"),
    "KPCA_CAM": ("kpca_cam", "kpca_cam"),
    "LayerCAM": ("layer_cam", "layer_cam"),
    "RandomCAM": ("random_cam", "random_cam"),
    "RefineCAM": ("refine_cam", "refine_cam"),
    "ScoreCAM": ("score_cam", "score_cam"),
    "SegEigenCAM": ("seg_eigen_cam", "seg_eigen_cam"),
    "ShapleyCAM": ("shapley_cam", "shapley_cam"),
    "XGradCAM": ("xgrad_cam", "xgrad_cam"),
}
GRAD_CAM = Elsewhere("pysal.pytorch_grad_cam", "pytorch_grad_cam", "pytorch_grad_cam", "grad-cam==1.5.7", HOMES)
