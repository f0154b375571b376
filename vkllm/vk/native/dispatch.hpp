// Force-included before every source file, Kompute's unmodified ones too: makes our `Dispatch` the default dispatcher of
// Vulkan-Hpp, so that we see (and may shape) every Vulkan call that Kompute makes and every result that it ignores.
//
// The pointer overloads that Kompute calls are noexcept: a failing result cannot be thrown from here. The first failing call
// of a thread is recorded instead, calls after it do nothing, and `Guard::check` raises it when control is back in our binding.
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace vkllm {
class Dispatch;
const Dispatch& dispatch() noexcept;
} // namespace vkllm

#define VULKAN_HPP_DEFAULT_DISPATCHER ::vkllm::dispatch()
#define VULKAN_HPP_DEFAULT_DISPATCHER_TYPE ::vkllm::Dispatch

#include <vulkan/vulkan.hpp>

namespace vk::detail {} // where headers from 1.4 on keep the loaders

namespace vkllm {

namespace loader {
using namespace vk;
using namespace vk::detail;
} // namespace loader

/// The first failing call of this thread since the last Guard was made.
struct Failure
{
    VkResult result = VK_SUCCESS;
    const char* call = "";
    uint64_t needed = 0; // bytes, where the call allocates
};

/// Thrown by the binding; becomes Python's NativeError(call, result, needed).
struct VulkanFailure : std::runtime_error
{
    explicit VulkanFailure(const Failure& f)
      : std::runtime_error(std::string(f.call) + " failed")
      , failure(f)
    {}
    Failure failure;
};

/// What Kompute created last on this thread and keeps private: its device, queue and fence.
struct Created
{
    VkDevice device = VK_NULL_HANDLE;
    VkQueue queue = VK_NULL_HANDLE;
    VkFence fence = VK_NULL_HANDLE;
};

extern thread_local Failure t_failure;
extern thread_local Created t_created;

/// Clears the thread's failure; `check` throws the one recorded since.
struct Guard
{
    Guard() { t_failure = {}; }
    ~Guard() { t_failure = {}; }
    static void check()
    {
        if (t_failure.result != VK_SUCCESS) {
            const Failure f = t_failure;
            t_failure = {};
            throw VulkanFailure(f);
        }
    }
};

/// Runs Kompute's code under a Guard. Where Kompute uses Vulkan-Hpp's throwing interface, vk::SystemError comes on top of what we
/// have recorded; ours says more.
template<typename F>
void
guarded(F&& f)
{
    const Guard guard;
    try {
        f();
    } catch (const vk::SystemError&) {
        Guard::check();
        throw;
    }
    Guard::check();
}

/// For tests: the `nth` next call of `name` (1 = the next one) returns `result` without reaching the driver.
void inject_fault(const std::string& name, int nth, int result);
/// The result to return in place of the call, or VK_SUCCESS.
VkResult take_fault(const char* name) noexcept;

class Dispatch : public loader::DispatchLoaderStatic
{
    using Base = loader::DispatchLoaderStatic;

    /// Runs `f` unless an earlier call failed; records the first failure. VK_TIMEOUT, VK_INCOMPLETE ... are no failures.
    template<typename F>
    static VkResult call(const char* name, F&& f, uint64_t needed = 0) noexcept
    {
        if (t_failure.result != VK_SUCCESS)
            return t_failure.result;
        VkResult r = take_fault(name);
        if (r == VK_SUCCESS)
            r = f();
        if (r < 0)
            t_failure = { r, name, needed };
        return r;
    }

  public:
    // Shaped calls: the API version, the feature chain.
    VkResult vkCreateInstance(const VkInstanceCreateInfo* info, const VkAllocationCallbacks* a, VkInstance* out) const noexcept;
    VkResult vkCreateDevice(VkPhysicalDevice p, const VkDeviceCreateInfo* info, const VkAllocationCallbacks* a, VkDevice* out) const noexcept;

    /// Kompute asks for storage and transfer usage only; texel views need their own bits.
    VkResult vkCreateBuffer(VkDevice d, const VkBufferCreateInfo* info, const VkAllocationCallbacks* a, VkBuffer* out) const noexcept
    {
        VkBufferCreateInfo ours = *info;
        ours.usage |= VK_BUFFER_USAGE_STORAGE_TEXEL_BUFFER_BIT | VK_BUFFER_USAGE_UNIFORM_TEXEL_BUFFER_BIT;
        return call("vkCreateBuffer", [&] { return Base::vkCreateBuffer(d, &ours, a, out); }, info->size);
    }
    VkResult vkAllocateMemory(VkDevice d, const VkMemoryAllocateInfo* info, const VkAllocationCallbacks* a, VkDeviceMemory* out) const noexcept
    {
        return call("vkAllocateMemory", [&] { return Base::vkAllocateMemory(d, info, a, out); }, info->allocationSize);
    }
    VkResult vkCreateFence(VkDevice d, const VkFenceCreateInfo* info, const VkAllocationCallbacks* a, VkFence* out) const noexcept
    {
        t_created.fence = VK_NULL_HANDLE;
        const VkResult r = call("vkCreateFence", [&] { return Base::vkCreateFence(d, info, a, out); });
        if (r == VK_SUCCESS)
            t_created.fence = *out;
        return r;
    }
    void vkGetDeviceQueue(VkDevice d, uint32_t family, uint32_t index, VkQueue* out) const noexcept
    {
        if (t_failure.result != VK_SUCCESS)
            return;
        Base::vkGetDeviceQueue(d, family, index, out);
        t_created.queue = *out;
    }
    void vkDestroyDevice(VkDevice d, const VkAllocationCallbacks* a) const noexcept
    {
        if (d != VK_NULL_HANDLE)
            Base::vkDestroyDevice(d, a);
    }
    void vkDestroyInstance(VkInstance i, const VkAllocationCallbacks* a) const noexcept
    {
        if (i != VK_NULL_HANDLE)
            Base::vkDestroyInstance(i, a);
    }
    void vkDestroyFence(VkDevice d, VkFence f, const VkAllocationCallbacks* a) const noexcept
    {
        // When vkCreateFence fails, kp::Sequence still holds the fence of its last run, which is gone.
        const bool stale = t_failure.result != VK_SUCCESS && t_created.fence == VK_NULL_HANDLE;
        if (f != VK_NULL_HANDLE && !stale)
            Base::vkDestroyFence(d, f, a);
    }
    void vkDestroyCommandPool(VkDevice d, VkCommandPool p, const VkAllocationCallbacks* a) const noexcept
    {
        if (p != VK_NULL_HANDLE)
            Base::vkDestroyCommandPool(d, p, a);
    }
    void vkFreeCommandBuffers(VkDevice d, VkCommandPool p, uint32_t n, const VkCommandBuffer* b) const noexcept
    {
        if (p != VK_NULL_HANDLE && *b != VK_NULL_HANDLE)
            Base::vkFreeCommandBuffers(d, p, n, b);
    }

// Watched calls: forwarded as they are.
#define VKLLM_WATCH(name, params, args)                                                                                \
    VkResult name params const noexcept                                                                                \
    {                                                                                                                  \
        return call(#name, [&] { return Base::name args; });                                                           \
    }
    VKLLM_WATCH(vkEnumeratePhysicalDevices, (VkInstance i, uint32_t* n, VkPhysicalDevice* out), (i, n, out))
    VKLLM_WATCH(vkBindBufferMemory, (VkDevice d, VkBuffer b, VkDeviceMemory m, VkDeviceSize o), (d, b, m, o))
    VKLLM_WATCH(vkMapMemory, (VkDevice d, VkDeviceMemory m, VkDeviceSize o, VkDeviceSize n, VkMemoryMapFlags f, void** out), (d, m, o, n, f, out))
    VKLLM_WATCH(vkCreateBufferView, (VkDevice d, const VkBufferViewCreateInfo* i, const VkAllocationCallbacks* a, VkBufferView* out), (d, i, a, out))
    VKLLM_WATCH(vkCreateShaderModule, (VkDevice d, const VkShaderModuleCreateInfo* i, const VkAllocationCallbacks* a, VkShaderModule* out), (d, i, a, out))
    VKLLM_WATCH(vkCreateDescriptorSetLayout, (VkDevice d, const VkDescriptorSetLayoutCreateInfo* i, const VkAllocationCallbacks* a, VkDescriptorSetLayout* out), (d, i, a, out))
    VKLLM_WATCH(vkCreatePipelineLayout, (VkDevice d, const VkPipelineLayoutCreateInfo* i, const VkAllocationCallbacks* a, VkPipelineLayout* out), (d, i, a, out))
    VKLLM_WATCH(vkCreatePipelineCache, (VkDevice d, const VkPipelineCacheCreateInfo* i, const VkAllocationCallbacks* a, VkPipelineCache* out), (d, i, a, out))
    VKLLM_WATCH(vkGetPipelineCacheData, (VkDevice d, VkPipelineCache c, size_t* n, void* out), (d, c, n, out))
    VKLLM_WATCH(vkCreateComputePipelines, (VkDevice d, VkPipelineCache c, uint32_t n, const VkComputePipelineCreateInfo* i, const VkAllocationCallbacks* a, VkPipeline* out), (d, c, n, i, a, out))
    VKLLM_WATCH(vkCreateDescriptorPool, (VkDevice d, const VkDescriptorPoolCreateInfo* i, const VkAllocationCallbacks* a, VkDescriptorPool* out), (d, i, a, out))
    VKLLM_WATCH(vkAllocateDescriptorSets, (VkDevice d, const VkDescriptorSetAllocateInfo* i, VkDescriptorSet* out), (d, i, out))
    VKLLM_WATCH(vkCreateQueryPool, (VkDevice d, const VkQueryPoolCreateInfo* i, const VkAllocationCallbacks* a, VkQueryPool* out), (d, i, a, out))
    VKLLM_WATCH(vkGetQueryPoolResults, (VkDevice d, VkQueryPool p, uint32_t first, uint32_t n, size_t size, void* out, VkDeviceSize stride, VkQueryResultFlags f), (d, p, first, n, size, out, stride, f))
    VKLLM_WATCH(vkCreateCommandPool, (VkDevice d, const VkCommandPoolCreateInfo* i, const VkAllocationCallbacks* a, VkCommandPool* out), (d, i, a, out))
    VKLLM_WATCH(vkAllocateCommandBuffers, (VkDevice d, const VkCommandBufferAllocateInfo* i, VkCommandBuffer* out), (d, i, out))
    VKLLM_WATCH(vkBeginCommandBuffer, (VkCommandBuffer c, const VkCommandBufferBeginInfo* i), (c, i))
    VKLLM_WATCH(vkEndCommandBuffer, (VkCommandBuffer c), (c))
    VKLLM_WATCH(vkQueueSubmit, (VkQueue q, uint32_t n, const VkSubmitInfo* i, VkFence f), (q, n, i, f))
    VKLLM_WATCH(vkWaitForFences, (VkDevice d, uint32_t n, const VkFence* f, VkBool32 all, uint64_t ns), (d, n, f, all, ns))
    VKLLM_WATCH(vkDeviceWaitIdle, (VkDevice d), (d))
#undef VKLLM_WATCH
};

} // namespace vkllm
