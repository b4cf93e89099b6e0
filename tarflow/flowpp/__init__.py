"""Flow++: couplings by mixtures of logistics, conditioned by gated convolutions and attention, and its dequantizer.

An image's path: :mod:`.dequantizer` (pixels to an image without steps), :mod:`.model` (a logit, then the stack),
:mod:`.layers` (norm, pointwise, coupling), :mod:`.splits` (what a coupling conditions on), :mod:`.networks` (how).

Source: Flow++ (arXiv 1902.00275).
"""
