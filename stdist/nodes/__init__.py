"""Forecasters of nodes (sensors, zones, cells of a grid): data, scaling, backbones and the stage that trains them."""
