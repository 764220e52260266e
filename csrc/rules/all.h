// The rules that there are. A new rule is a header here and a line below.
#pragma once

#include "adabelief.h"
#include "adamaxw.h"

#define FUSED_OPTIM_RULES(X) X(AdaBelief) X(AdaBeliefNesterov) X(AdamaxW)
