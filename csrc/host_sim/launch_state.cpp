#include "host_sim/launch_state.h"

#include <cstdio>

namespace fastopt::host_sim {

std::string coordinate_text(const dim3& at) {
  return "(" + std::to_string(at.x) + "," + std::to_string(at.y) + "," + std::to_string(at.z) + ")";
}

dim3 LaunchState::coordinates(uint32_t block) const {
  return {block % shape.grid.x, block / shape.grid.x % shape.grid.y,
          block / shape.grid.x / shape.grid.y};
}

std::string LaunchState::describe_block(uint32_t block) const {
  return coordinate_text(coordinates(block));
}

std::string LaunchState::describe(const Race& race) const {
  char address[32];
  snprintf(address, sizeof address, "%p", race.address);
  return "race: blocks " + describe_block(race.first_block) + " and " +
         describe_block(race.second_block) + " write different values to the byte at " + address +
         ", and nothing orders them";
}

}  // namespace fastopt::host_sim
