"""What only captum has, and where it has ours."""

from pysal._elsewhere import Elsewhere

# Our classes: the module that each is in, and captum's.
HOMES = {
    "Attribution": ("_bases", "attr._utils.attribution"),
    "Deconvolution": ("guided_backprop", "attr._core.guided_backprop_deconvnet"),
    "DeepLift": ("deep_lift", "attr._core.deep_lift"),
    "DeepLiftShap": ("deep_lift", "attr._core.deep_lift"),
    "FeatureAblation": ("feature_ablation", "attr._core.feature_ablation"),
    "FeaturePermutation": ("feature_permutation", "attr._core.feature_permutation"),
    "GradientAttribution": ("_bases", "attr._utils.attribution"),
    "GradientShap": ("gradient_shap", "attr._core.gradient_shap"),
    "GuidedBackprop": ("guided_backprop", "attr._core.guided_backprop_deconvnet"),
    "GuidedGradCam": ("grad_cam", "attr._core.guided_grad_cam"),
    "InputBaselineXGradient": ("gradient_shap", "attr._core.gradient_shap"),
    "InputXGradient": ("input_x_gradient", "attr._core.input_x_gradient"),
    "IntegratedGradients": ("integrated_gradients", "attr._core.integrated_gradients"),
    "KernelShap": ("lime", "attr._core.kernel_shap"),
    "LayerActivation": ("layer_activation", "attr._core.layer.layer_activation"),
    "LayerAttribution": ("_bases", "attr._utils.attribution"),
    "LayerGradCam": ("grad_cam", "attr._core.layer.grad_cam"),
    "LayerGradientXActivation": ("layer_gradient_x_activation", "attr._core.layer.layer_gradient_x_activation"),
    "LayerIntegratedGradients": ("layer_integrated_gradients", "attr._core.layer.layer_integrated_gradients"),
    "Lime": ("lime", "attr._core.lime"),
    "NoiseTunnel": ("noise_tunnel", "attr._core.noise_tunnel"),
    "Occlusion": ("occlusion", "attr._core.occlusion"),
    "PerturbationAttribution": ("_bases", "attr._utils.attribution"),
    "Saliency": ("saliency", "attr._core.saliency"),
    "ShapleyValueSampling": ("shapley_value", "attr._core.shapley_value"),
    "ShapleyValues": ("shapley_value", "attr._core.shapley_value"),
}
CAPTUM = Elsewhere("pysal.captum", "captum", "captum.attr", "captum==0.9.0", HOMES)
