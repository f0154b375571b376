// What a physical device offers: the feature structs that we know, queried once and passed to vkCreateDevice as they are.
#pragma once

#include <array>
#include <string>
#include <vector>

#include <vulkan/vulkan.h>

namespace vkllm {

// VK_KHR_cooperative_matrix is newer than Debian 12's headers (1.3.239): the few declarations that we need, under our own names.
constexpr auto COOPERATIVE_MATRIX_EXTENSION = "VK_KHR_cooperative_matrix";

struct CooperativeMatrixFeatures
{
    VkStructureType sType = static_cast<VkStructureType>(1000506000);
    void* pNext = nullptr;
    VkBool32 cooperativeMatrix = VK_FALSE;
    VkBool32 cooperativeMatrixRobustBufferAccess = VK_FALSE;
};

struct CooperativeMatrixProperties
{
    VkStructureType sType = static_cast<VkStructureType>(1000506001);
    void* pNext = nullptr;
    uint32_t m = 0, n = 0, k = 0;
    uint32_t a = 0, b = 0, c = 0, result = 0; // VkComponentTypeKHR
    VkBool32 saturating = VK_FALSE;
    uint32_t scope = 0; // VkScopeKHR; 3 = subgroup
};

using GetCooperativeMatrixProperties = VkResult(VKAPI_PTR*)(VkPhysicalDevice, uint32_t*, CooperativeMatrixProperties*);

/// The feature structs of a device, chained, and the extensions that must be enabled for them. Not movable: it points into itself.
class FeatureChain
{
  public:
    explicit FeatureChain(VkPhysicalDevice device);
    FeatureChain(const FeatureChain&) = delete;
    FeatureChain& operator=(const FeatureChain&) = delete;

    bool has_extension(const std::string& name) const;

    VkPhysicalDeviceFeatures2 core{ VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2, nullptr, {} };
    VkPhysicalDevice16BitStorageFeatures storage16{ VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_16BIT_STORAGE_FEATURES };
    VkPhysicalDevice8BitStorageFeatures storage8{ VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_8BIT_STORAGE_FEATURES };
    VkPhysicalDeviceShaderFloat16Int8Features float16_int8{ VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SHADER_FLOAT16_INT8_FEATURES };
    VkPhysicalDeviceShaderSubgroupExtendedTypesFeatures subgroup_types{ VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SHADER_SUBGROUP_EXTENDED_TYPES_FEATURES };
    VkPhysicalDeviceVulkanMemoryModelFeatures memory_model{ VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_MEMORY_MODEL_FEATURES };
    VkPhysicalDeviceSubgroupSizeControlFeatures subgroup_size{ VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_SIZE_CONTROL_FEATURES };
    VkPhysicalDeviceShaderIntegerDotProductFeatures dot{ VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SHADER_INTEGER_DOT_PRODUCT_FEATURES };
    VkPhysicalDeviceMaintenance4Features maintenance4{ VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MAINTENANCE_4_FEATURES };
    CooperativeMatrixFeatures cooperative;

    uint32_t api_version = 0;
    std::vector<std::string> extensions; // to enable
    std::vector<std::string> available;  // all that the device offers
};

/// The words of Kernel.features that this device fulfils, and a few of our own.
std::vector<std::string> feature_words(VkPhysicalDevice device, const FeatureChain& chain);

} // namespace vkllm
