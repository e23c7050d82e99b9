"""A module with several applications, neither of them named ``app``."""

from flowkit import Flowkit

orders = Flowkit("orders")
parcels = Flowkit("parcels")
