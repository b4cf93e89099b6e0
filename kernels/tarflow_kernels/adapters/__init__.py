"""Flows of other libraries on these kernels: ``adapters.<library>.accelerate(flow)`` returns an equivalent flow.

Each module imports its library, and none patches it: the flow that is returned is a copy that shares all parameters
and buffers, in which some transforms have been replaced by subclasses of the library's.
"""
