_base_ = './default_runtime.py'

default_scope = 'mmpretrain'
default_hooks = dict(
    checkpoint=dict(save_best='accuracy/top1'),
    visualization=dict(type='VisualizationHook', enable=False))
visualizer = dict(type='UniversalVisualizer', vis_backends=_base_.vis_backends)

# flip, scores averaged; tools/test.py --tta appends it to the test pipeline
tta_model = dict(type='AverageClsScoreTTA')
