"""The Space: the page of timm-ssm."""
from timm_ssm.app import serve

serve()
