"""The benchmark harness: what the proxy costs beside Envoy, HAProxy and no proxy at all.

One file per question. Every case starts the real programs, loads them in interleaved rounds and gives medians and
ratios; nothing here is imported by the proxy.
"""
