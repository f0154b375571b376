// A device, its buffers and pipelines: thin owners of Vulkan handles over one kp::Manager. Every object keeps its device alive.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <tuple>

#include "kompute/Manager.hpp"

namespace vkllm {

class Device;

/// (available, total) bytes of the largest device-local heap. Available is what is left of the driver's budget; where the driver
/// tells none, of the heap without `ours`, the bytes that we hold by heap.
std::pair<uint64_t, uint64_t> heap_budget(VkPhysicalDevice device, const std::array<uint64_t, VK_MAX_MEMORY_HEAPS>& ours);

/// A buffer with its own memory. Not a kp::Tensor: that counts bytes in 32 bits, offers no choice of memory type, and fills
/// host memory from a copy that the caller must hold.
class Buffer : public std::enable_shared_from_this<Buffer>
{
  public:
    Buffer(std::shared_ptr<Device> device, uint64_t nbytes, bool host);
    /// Host memory used where it lies (VK_EXT_external_memory_host): the first `nbytes` of `available` from `data`, both of them
    /// multiples of the device's import alignment. `owner` keeps the memory.
    Buffer(std::shared_ptr<Device> device, uint64_t nbytes, void* data, uint64_t available, std::shared_ptr<void> owner);
    ~Buffer();
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    /// A texel view of a range; made once for each (format, offset, nbytes).
    VkBufferView texel_view(VkFormat format, uint64_t offset, uint64_t nbytes);

    const std::shared_ptr<Device> device;
    const uint64_t nbytes;
    VkBuffer handle = VK_NULL_HANDLE;
    void* mapped = nullptr; // nullptr: not host-visible

  private:
    void release() noexcept;
    std::shared_ptr<void> m_owner; // of imported memory
    VkDeviceMemory m_memory = VK_NULL_HANDLE;
    uint64_t m_allocated = 0; // bytes, of heap m_heap
    uint32_t m_heap = 0;
    std::map<std::tuple<VkFormat, uint64_t, uint64_t>, VkBufferView> m_views;
};

struct Specialization
{
    uint32_t id;
    uint32_t bits; // the 32-bit value
};

class Pipeline
{
  public:
    Pipeline(std::shared_ptr<Device> device, const std::string& spirv, std::vector<VkDescriptorType> types, uint32_t push_bytes,
             const std::vector<Specialization>& spec, uint32_t required_subgroup_size);
    ~Pipeline();
    Pipeline(const Pipeline&) = delete;
    Pipeline& operator=(const Pipeline&) = delete;

    const std::shared_ptr<Device> device;
    const std::vector<VkDescriptorType> types;
    const uint32_t push_bytes;
    VkDescriptorSetLayout set_layout = VK_NULL_HANDLE;
    VkPipelineLayout layout = VK_NULL_HANDLE;
    VkPipeline handle = VK_NULL_HANDLE;

  private:
    void release() noexcept;
};

class Device : public std::enable_shared_from_this<Device>
{
  public:
    /// Raises VulkanFailure, or vk::SystemError from Kompute. `force_unmapped`: for tests, buffers with host=false are never mapped.
    Device(uint32_t index, uint32_t family, const std::string& cache_data, bool force_unmapped);
    ~Device();
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;

    std::pair<uint64_t, uint64_t> memory_budget() const { return heap_budget(physical, allocated); }
    std::string cache_data() const;
    void wait_idle();
    uint32_t memory_type(uint32_t allowed, bool host) const;

    VkPhysicalDevice physical = VK_NULL_HANDLE;
    VkDevice handle = VK_NULL_HANDLE;
    VkQueue queue = VK_NULL_HANDLE;
    VkPipelineCache cache = VK_NULL_HANDLE;
    VkPhysicalDeviceMemoryProperties memory{};
    std::shared_ptr<kp::Manager> manager; // owns instance and device
    std::mutex queue_mutex;               // vkQueueSubmit wants external synchronization
    std::array<uint64_t, VK_MAX_MEMORY_HEAPS> allocated{}; // bytes we hold, by heap
    const bool force_unmapped;
};

} // namespace vkllm
