"""One pool of Ray actors that hold a model and do what they are asked: rollouts of a training, sweeps of forecasts."""
