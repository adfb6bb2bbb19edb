"""The run configurations, installed as data of `cat_fast.configs`."""
