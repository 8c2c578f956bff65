# What `rsm_guidance/__init__.py` loads when it is used, for type checkers and editors; a test compares the two.
from diffusers import StableDiffusion3Pipeline

from rsm_guidance import shapes as shapes
from rsm_guidance.core.ledger import Budget as Budget
from rsm_guidance.core.ledger import Ledger as Ledger
from rsm_guidance.core.transitions import CPS as CPS
from rsm_guidance.core.transitions import DDIM as DDIM
from rsm_guidance.core.transitions import GLASS as GLASS
from rsm_guidance.core.transitions import ODE as ODE
from rsm_guidance.core.transitions import FlowSDE as FlowSDE
from rsm_guidance.core.transitions import SchedulerSteps as SchedulerSteps
from rsm_guidance.core.transitions import Transition as Transition
from rsm_guidance.pipelines import custom_pipeline as custom_pipeline
from rsm_guidance.pipelines.auto import RewardGuidedPipeline as RewardGuidedPipeline
from rsm_guidance.pipelines.guided import GuidedPipelineOutput as GuidedPipelineOutput
from rsm_guidance.pipelines.guided import reward_guided as reward_guided
from rsm_guidance.reward_models import DiffusionRewardModel as DiffusionRewardModel
from rsm_guidance.rewards import Composite as Composite
from rsm_guidance.rewards import Term as Term
from rsm_guidance.rewards import resolve_reward as resolve_reward
from rsm_guidance.samplers import SAMPLERS as SAMPLERS
from rsm_guidance.samplers import SVDD as SVDD
from rsm_guidance.samplers import Backtracking as Backtracking
from rsm_guidance.samplers import BestOfN as BestOfN
from rsm_guidance.samplers import Demon as Demon
from rsm_guidance.samplers import FKSteering as FKSteering
from rsm_guidance.samplers import Funnel as Funnel
from rsm_guidance.samplers import Lidar as Lidar
from rsm_guidance.samplers import Monitor as Monitor
from rsm_guidance.samplers import NoiseOptimization as NoiseOptimization
from rsm_guidance.samplers import NoiseSearch as NoiseSearch
from rsm_guidance.samplers import PsiSampler as PsiSampler
from rsm_guidance.samplers import RewardGradient as RewardGradient
from rsm_guidance.samplers import RollingSelection as RollingSelection
from rsm_guidance.samplers import StepwiseSampling as StepwiseSampling
from rsm_guidance.samplers import TreeSampling as TreeSampling
from rsm_guidance.samplers import TreeSearch as TreeSearch
from rsm_guidance.samplers import TwistedSMC as TwistedSMC
from rsm_guidance.samplers import Unguided as Unguided
from rsm_guidance.samplers import make_sampler as make_sampler
from rsm_guidance.samplers import parse_sampler as parse_sampler
from rsm_guidance.values import Lookahead as Lookahead
from rsm_guidance.values import Smoothed as Smoothed
from rsm_guidance.values import Tweedie as Tweedie

__version__: str
RewardGuidedStableDiffusion3Pipeline: type[StableDiffusion3Pipeline]
