"""Flow++: couplings by mixtures of logistics, conditioned by gated convolutions and attention, and its dequantizer.

The files, in the order in which an image passes them: :mod:`.dequantizer` (pixels become an image without steps),
:mod:`.model` (a logit, then the flow), :mod:`.layers` (norm, invertible convolution, coupling), :mod:`.splits` (which
half a coupling conditions on) and :mod:`.networks` (how). All settings are in :mod:`.config`.

Source: Flow++ (arXiv 1902.00275).
"""
